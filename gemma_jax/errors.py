"""The one exception that stands for a mistake of the user rather than a bug, and the status of a stop."""

# sysexits.h EX_TEMPFAIL: "try again later". Launchers restart on it: the same command resumes.
RESTART_STATUS = 75


class UserError(Exception):
    """Something the user can put right: a wrong key, a missing file, a mesh that does not divide.

    Its message is one sentence that names the value and the remedy. The commands print it without
    a traceback and exit with status 2; any other exception is a bug and keeps its traceback.
    """
