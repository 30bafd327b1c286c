//! One at a time by key: calls that say that they want the same thing get the same thing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::OwnedMutexGuard;

/// Held for as long as it is this caller's turn.
pub(super) type Turn = OwnedMutexGuard<()>;

/// All keys for which it is somebody's turn.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// Wait for the turn of this key.
    pub(super) async fn take(&self, key: String) -> Turn {
        self.entry(key).lock_owned().await
    }

    /// Wait for the turns of all of these keys; nobody who takes them so waits for somebody who waits for them.
    pub(super) async fn take_all(&self, keys: impl IntoIterator<Item = String>) -> Vec<Turn> {
        let mut keys: Vec<String> = keys.into_iter().collect();
        keys.sort();
        keys.dedup();
        let mut turns = Vec::with_capacity(keys.len());
        for key in keys {
            turns.push(self.take(key).await);
        }
        turns
    }

    fn entry(&self, key: String) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turn) = turns.get(&key).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        turns.insert(key, Arc::downgrade(&turn));
        turn
    }
}
