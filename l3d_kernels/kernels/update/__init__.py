"""Move directions: a step of Adam, and the rescaling to unit norm, in place.

In come lists of tensors [K, ...] whose slices k are subnetworks; slices that rest are neither read nor written. Read
`adam` first: it also leaves the Gram matrices that the norms follow from, which `rescale` then needs.
"""
