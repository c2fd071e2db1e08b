class UserError(Exception):
    """A mistake of the user's: the scripts print it as one to three lines and exit with code 2."""
