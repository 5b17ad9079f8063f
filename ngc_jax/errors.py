"""The one error that a user causes and can mend. Commands print its message as a single line and exit with code 2."""


class UserError(ValueError):
    """Something given by the user is wrong; the message names it, its value, and a value that would work."""
