//! Machines: their lifecycle as a pure table, and the tasks that make it happen.

pub mod hypervisor;
