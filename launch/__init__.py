"""Training on Ray: the one package that imports ray.

It lies at the top of a checkout, and `rechub_dist/launch` links there: in a checkout as in a wheel its name is
`rechub_dist.launch`.
"""
