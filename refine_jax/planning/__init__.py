"""What a run would take on devices that are not here, from programs compiled for them."""
