"""The ONNX engine: a policy as one graph that server and clients run alike.

``plan`` and ``connectors`` decide what has a graph; ``observations``, ``graphs`` and ``actions`` are
its parts; ``template`` exports it once and fills in each version; ``check`` tries it out, and
``parity`` measures how close it is to RLlib. ``factory`` is what the env runner uses.
"""
