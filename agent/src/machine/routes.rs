//! Which port of the proxy leads where, in memory, and the listeners that go with it.
//!
//! The store has the truth; this is a copy, at most ten thousand entries, so that a request needs no query.

use super::error::MachineError;
use crate::store::ServiceRoute;
use async_trait::async_trait;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use torpor_api::http::ServiceKind;

/// Opens and closes the proxy's ports.
#[async_trait]
pub trait Listeners: Send + Sync + 'static {
    /// Accept on this port from now on.
    ///
    /// # Errors
    /// The port cannot be bound.
    fn open(&self, listen_port: u16, kind: ServiceKind) -> Result<(), MachineError>;
    /// Accept no more; answers when the port is free.
    async fn close(&self, listen_port: u16);
}

/// The routes of all services.
#[derive(Default)]
pub struct Routes {
    by_port: RwLock<HashMap<u16, ServiceRoute>>,
    listeners: OnceLock<Arc<dyn Listeners>>,
}

impl Routes {
    /// Say who listens. Only the first one counts.
    pub fn attach(&self, listeners: Arc<dyn Listeners>) {
        let _ = self.listeners.set(listeners);
    }

    /// Add a route and listen.
    ///
    /// # Errors
    /// The port cannot be bound; there is no route then.
    pub fn open(&self, route: ServiceRoute) -> Result<(), MachineError> {
        let (port, kind) = (route.listen_port, route.kind);
        let mut routes = self.by_port.write().unwrap_or_else(PoisonError::into_inner);
        // Exposing what is exposed changes nothing, and must not bind twice.
        if routes.get(&port) == Some(&route) {
            return Ok(());
        }
        if let Some(listeners) = self.listeners.get() {
            listeners.open(port, kind)?;
        }
        routes.insert(port, route);
        Ok(())
    }

    /// Where a port leads.
    #[must_use]
    pub fn find(&self, listen_port: u16) -> Option<ServiceRoute> {
        self.by_port
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&listen_port)
            .cloned()
    }

    /// Take a route away and stop listening.
    pub async fn close(&self, listen_port: u16) {
        self.by_port
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&listen_port);
        if let Some(listeners) = self.listeners.get() {
            listeners.close(listen_port).await;
        }
    }
}
