"""What every training shares: what is kept, processes, the guard, the monitor."""
