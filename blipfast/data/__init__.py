"""Pictures and captions: reading pairs, augmenting them, and handing them out in an order that survives a restart."""
