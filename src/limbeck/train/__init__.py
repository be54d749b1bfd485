"""The loop and what it needs: batches, mesh, optimizer, checkpoints, listeners."""
