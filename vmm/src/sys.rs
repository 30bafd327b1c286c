//! System calls and ioctls that need `unsafe`, each behind a safe function or a type that owns what it maps.

pub mod file_view;
pub mod kvm;
pub mod page_cache;
pub mod pagemap;
pub mod process;
pub mod uffd;
