"""Selects the documents of tiny_is_animal.yaml."""


def yes_or_no(documents):
    """Return the questions whose answer is yes or no."""
    return documents.filter(lambda document: document["output"] in ("Yes.", "No."))
