"""What ``policy-server`` does: ``train``, ``check``, ``compare``, ``export``.

``policy_server.cli`` is the way in, ``options`` says what can be asked for. Each command has a module
of its own; those beside them are what they share. Nothing of the server imports from here.
"""
