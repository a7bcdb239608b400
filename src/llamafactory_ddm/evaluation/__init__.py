"""How good generated texts are."""
