"""Who moves tensors between ranks, one file an engine; :mod:`hvdloss.torch._backend` chooses one."""
