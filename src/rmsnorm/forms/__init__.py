"""The forms of the norm beside the plain one, each in a place of its own."""
