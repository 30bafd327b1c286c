//! vsock against a guest's driver written to the specification: data, credit, ends, restores, damage.

mod data;
mod ends;
mod guest;
mod life;
