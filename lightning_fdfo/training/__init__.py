"""What an update needs: optimisers, base weights, the loss, and checks on its gradient."""
