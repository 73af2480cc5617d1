"""What-if on modelled ranks: the same policies, on up to 10,000 of them."""
