//! One virtual machine per process: KVM, guest memory, hibernation images and virtio devices, driven over
//! the control protocol of [`torpor_api::vmm`].

pub mod devices;
pub mod memory;
