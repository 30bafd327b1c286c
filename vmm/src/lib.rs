//! One virtual machine per process: KVM, guest memory, hibernation images and virtio devices, driven over
//! the control protocol of [`torpor_api::vmm`].
//!
//! Read [`vm`] first: it owns everything else and holds the state machine. [`control`] turns datagrams into
//! its calls, [`vcpu`] runs the guest, [`memory`] holds its RAM and serves misses, [`image`] writes and
//! reads hibernation images, [`arch`] is what differs between processor architectures.

pub mod arch;
pub mod control;
pub mod devices;
pub mod image;
pub mod layout;
pub mod memory;
mod pages;
pub mod pm1;
pub mod seccomp;
pub mod sys;
pub mod vcpu;
pub mod vm;
