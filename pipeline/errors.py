"""Errors a user can mend before a job starts."""


class StartupError(Exception):
    """Say in one message which setting is wrong, what was found, and what to do."""
