"""Object stores: inputs that are fetched to each node, and run directories that outlive a disk."""
