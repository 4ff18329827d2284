"""Where the time of a step goes: tables, a log of collectives, a trace of a few steps. Listens, and decides nothing."""
