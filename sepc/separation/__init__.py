"""The search for a plan: what to make of each layer of a network within a budget, tried before it is believed."""
