"""Jobs on a Kubernetes cluster: the client, and what it is made of.

``connection`` is the only module of the SDK that knows how to talk to an API server.
"""
