//! Guest memory.

use std::sync::Arc;

/// Guest memory as devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// What the balloon calls with guest physical address and length in bytes of pages that the guest gave back.
pub type DiscardSink = Arc<dyn Fn(u64, u64) + Send + Sync>;
