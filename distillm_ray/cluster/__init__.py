"""Roles as Ray actors: placement, pools with restarts, and the calls between them."""
