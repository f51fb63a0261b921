"""The verbs of the command line, a module each: options, help, and a call of what does the work.

Each has an ``app`` that ``cli`` attaches. What they do is in modules that they load inside their
functions, so that ``--help`` and completion stay instant.
"""
