"""Write, check and run TempFlow-GRPO jobs: the Python SDK and the command line.

``manifest`` turns YAML into a typed job, ``local`` runs it on this machine, ``checkpoints`` lists
and pulls what a run has stored, ``render`` shows it. Nothing here needs torch or a cluster.
"""
