"""The one exception that is written for the person at the keyboard."""


class UserError(ValueError):
    """Bad input. The message is one line: which file, field or tensor, what is wrong, what to do.

    Command lines print it to stderr and exit with 1; everything else that is raised is a defect.
    """
