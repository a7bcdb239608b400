"""How long a test waits: nothing here is a measurement, and the machine may be loaded four times over."""

LIMIT = 4 * 400  # seconds until a process counts as hung
ANSWER = 4 * 60  # seconds until a program that runs already counts as hung where it owes an answer
