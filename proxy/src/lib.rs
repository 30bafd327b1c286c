//! Torpor's data plane: it accepts, holds a request while its machine wakes, and forwards it unchanged.
//!
//! It knows no machine. Everything it needs of one it asks of a [`Waker`]; everything it is told to listen on
//! comes from [`Proxy::expose`] and [`Proxy::serve_host_names`].
//!
//! | module | owns |
//! |---|---|
//! | `waker` | the [`Waker`] trait and what passes through it |
//! | `listen` | [`Proxy`]: listeners, bounds on connections, shutdown |

#![forbid(unsafe_code)]

mod listen;
mod waker;

pub use listen::{ListenError, Proxy, ProxyConfig};
pub use waker::{
    Activity, Cause, Connected, DEFAULT_RETRY_AFTER, FirstByteHook, Guard, Target, Transport, Upstream,
    WakeRefusal, WakeRequest, WakeTrace, Waker,
};
