"""Model directories, output heads, packed forward passes, and students made of teacher layers."""
