"""What ``flightquant bench`` runs: kernels against memory and against other libraries, the exchange over loopback."""
