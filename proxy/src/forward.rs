//! One client connection: from its first byte to its last.
//!
//! Every connection is one task (plus one per connection to a guest, which hyper needs, and one per upgraded
//! connection). Nothing here listens; nothing here knows machines.

mod admission;
mod frames;
mod headers;
mod http;
mod tcp;
mod tunnel;
mod upstream;

pub(crate) use self::http::{From, LAST_WORDS, Privacy, serve_http};
pub(crate) use self::tcp::serve_tcp;

use crate::listen::ProxyConfig;
use crate::route::Route;
use crate::waker::Waker;
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::task::TaskTracker;

/// What all connections of one listener share.
pub(crate) struct Shared {
    pub(crate) waker: Arc<dyn Waker>,
    pub(crate) config: Arc<ProxyConfig>,
    pub(crate) route: Route,
    pub(crate) tasks: TaskTracker,
}

/// One of a listener's connections, held by its task and by what it upgraded to.
pub(crate) type Permit = Arc<OwnedSemaphorePermit>;
