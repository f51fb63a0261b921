"""The one exception of the test cluster: its text is one line that says what to do next."""


class ClusterError(RuntimeError):
    """A step of the test cluster failed for a reason that its message names."""
