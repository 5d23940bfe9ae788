"""The service: layers in, quantized layers out, over Arrow Flight, with health, metrics and a graceful end.

``flightquant serve`` runs it as a process (:func:`flightquant.server.app.run`), another program runs it inside itself
(:func:`flightquant.server.app.running_server`).
"""
