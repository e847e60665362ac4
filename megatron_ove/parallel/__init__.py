"""Everything that knows about ranks: topology, groups, collectives, the CPU backend."""
