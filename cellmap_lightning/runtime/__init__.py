"""Random numbers, threads, buffers and interrupts: what every other layer runs on."""
