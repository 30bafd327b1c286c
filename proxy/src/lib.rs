//! Torpor's data plane: it accepts, holds a request while its machine wakes, and forwards it unchanged.
//!
//! It knows no machine. Everything it needs of one it asks of a [`Waker`]; everything it is told to listen on
//! comes from [`Proxy::expose`] and [`Proxy::serve_host_names`].
//!
//! | module | owns |
//! |---|---|
//! | `waker` | the [`Waker`] trait and what passes through it |
//! | `listen` | [`Proxy`]: listeners, bounds on connections, shutdown |
//! | `tls` | the operator's certificate, and its renewal |
//! | `route` | which target a request means |
//! | `forward` | one client connection: `http` (with `admission`, `upstream`, `headers`), `tcp`, and `tunnel` for upgrades |
//! | `meter` | counting bytes and holding guards while bodies and streams pass |
//! | `phase` | what a client connection is doing, and the time it may take |
//! | `respond` | the one place that turns an error into a response |
//!
//! A request passes `listen` → `phase` → `forward::http` → `route` → [`Waker::connect`] → `forward::upstream`,
//! and its answer comes back through `meter`. It is sent to a guest at most once.

#![forbid(unsafe_code)]

mod forward;
mod listen;
mod meter;
mod phase;
mod respond;
mod route;
mod tls;
mod waker;

pub use listen::{Entrance, ListenError, OwnSockets, Proxy, ProxyConfig, Sockets};
pub use tls::{Tls, TlsError};
pub use waker::{
    Activity, Admission, Awake, Cause, Connected, DEFAULT_RETRY_AFTER, EdgeCookie, FirstByteHook, Guard,
    Line, OwnAnswer, Shown, Target, Transport, Upstream, WakeRefusal, WakeRequest, WakeTrace, Waker,
};
