//! Where guest memory comes from.

use super::lazy::LazyMemory;

/// What serves the first touch of a page.
#[derive(Debug)]
pub enum Backing {
    /// A fresh boot: the kernel, with zeros.
    Anonymous,
    /// A restore: a thread, from a hibernation image.
    Lazy(LazyMemory),
}
