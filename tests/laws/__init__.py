"""What holds for every adapter, said once; `driver` says what an adapter lends."""
