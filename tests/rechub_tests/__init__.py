"""What tests share: data sets, run files, ranks, damage. A package, so that no folder beside it is taken for it."""
