"""What crosses the wire: generated stubs, tensors, spaces, batches and faults.

Both sides use it: the client directly, the policy server for the other direction. Nothing here
does I/O, and everything may be used from any thread.
"""

PROTOCOL_VERSION = "1.0"
"""Major and minor version of the contract that this release speaks."""

HANDLE_HEADER = "policyserver-env-handle"
"""In the metadata of a Drive: the environments that live as long as it does, ahead of any request."""

MAX_METRICS = 1000
"""Names of the application's own numbers in one episode; a bound for names that never repeat."""

MAX_METRIC_NAME = 256
"""Characters of such a name."""
