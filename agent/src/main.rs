//! `torpord`: reads the configuration, wires the parts together, waits for a signal.

fn main() {}
