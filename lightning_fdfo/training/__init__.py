"""What an update needs and what keeps it right: optimisers, base weights, guards."""
