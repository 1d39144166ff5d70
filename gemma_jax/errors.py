"""The exception for a mistake of the user rather than a bug, and the exit status that asks for a restart."""

# EX_TEMPFAIL of sysexits.h, "try again later". Launchers restart the job on this exit status, and the same
# command then resumes the run.
RESTART_STATUS = 75


class UserError(Exception):
    """A mistake that the user can correct: a wrong key, a missing file, a mesh that does not divide an axis.

    Its message is one sentence that names the value and the remedy. The commands print it without
    a traceback and exit with status 2; any other exception is a bug and keeps its traceback.
    """
