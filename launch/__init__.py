"""Training on Ray: the only package that imports ray.

It is at the top of a checkout, and `rechub_dist/launch` is a link to it: in a checkout and in a wheel it is imported as
`rechub_dist.launch`.
"""
