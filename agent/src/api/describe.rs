//! What a handler takes and answers, as its types say: the OpenAPI documents are made of nothing else.
//!
//! Every extractor is [`Taken`] and every answer is [`Answered`], so a route without a schema does not compile.

use super::extract::{Json as Body, LargeJson, Named, OptionalJson, Path, Query, RawJson};
use crate::machine::fleet::Fleet;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::{Extension, Json};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use utoipa::openapi::path::ParameterIn;
use utoipa::{IntoParams, PartialSchema, ToSchema};

/// One operation, without its path.
#[derive(Debug, Default)]
pub(super) struct Description {
    pub(super) parameters: Vec<Value>,
    /// Schemas of the names between braces, in their order, where they are no texts.
    pub(super) in_path: Vec<Value>,
    pub(super) body: Option<Value>,
    /// By status.
    pub(super) responses: Map<String, Value>,
    /// What the schemas above refer to.
    pub(super) schemas: BTreeMap<String, Value>,
}

impl Description {
    fn schema<T: ToSchema>(&mut self) -> Value {
        let mut named = Vec::new();
        T::schemas(&mut named);
        let named = named.into_iter().map(|(name, schema)| (name, json!(schema)));
        self.schemas.extend(named);
        json!(T::schema())
    }

    fn json_body<T: ToSchema>(&mut self, required: bool) {
        let schema = self.schema::<T>();
        let content = json!({ "application/json": { "schema": schema } });
        self.body = Some(json!({ "required": required, "content": content }));
    }

    fn json_answer<T: ToSchema>(&mut self, status: &str, description: &str) {
        let schema = self.schema::<T>();
        self.answer(
            status,
            description,
            json!({ "application/json": { "schema": schema } }),
        );
    }

    /// An answer with this content, or with none if it is `null`.
    pub(super) fn answer(&mut self, status: &str, description: &str, content: Value) {
        let mut answer = json!({ "description": description });
        if !content.is_null() {
            answer["content"] = content;
        }
        self.responses.insert(status.to_owned(), answer);
    }

    fn raw_body(&mut self) {
        self.body = Some(json!({ "required": false, "content": { "application/octet-stream": {} } }));
    }
}

/// What a handler has as an argument.
pub(super) trait Taken {
    fn describe(into: &mut Description);
}

/// What a handler returns.
pub(super) trait Answered {
    fn describe(into: &mut Description);
}

/// A handler with these arguments, in axum's own numbering of them.
pub(super) trait Described<T> {
    fn description() -> Description;
}

impl<F, Fut, R> Described<((),)> for F
where
    F: FnOnce() -> Fut,
    Fut: Future<Output = R>,
    R: Answered,
{
    fn description() -> Description {
        let mut description = Description::default();
        R::describe(&mut description);
        description
    }
}

macro_rules! described {
    ($($argument:ident)+) => {
        impl<F, Fut, R, M, $($argument),+> Described<(M, $($argument,)+)> for F
        where
            F: FnOnce($($argument),+) -> Fut,
            Fut: Future<Output = R>,
            R: Answered,
            $($argument: Taken,)+
        {
            fn description() -> Description {
                let mut description = Description::default();
                $($argument::describe(&mut description);)+
                R::describe(&mut description);
                description
            }
        }
    };
}

described!(A);
described!(A B);
described!(A B C);
described!(A B C D);
described!(A B C D E);

/// An argument that a client does not see.
macro_rules! unseen {
    ($($argument:ty),+) => { $(impl Taken for $argument { fn describe(_: &mut Description) {} })+ };
}

unseen!(
    State<Fleet>,
    Named,
    Result<WebSocketUpgrade, WebSocketUpgradeRejection>
);

impl<T> Taken for Extension<T> {
    fn describe(_: &mut Description) {}
}

impl<T: ToSchema> Taken for Body<T> {
    fn describe(into: &mut Description) {
        into.json_body::<T>(true);
    }
}

impl<T: ToSchema> Taken for LargeJson<T> {
    fn describe(into: &mut Description) {
        into.json_body::<T>(true);
    }
}

impl<T: ToSchema> Taken for RawJson<T> {
    fn describe(into: &mut Description) {
        into.json_body::<T>(true);
    }
}

impl<T: ToSchema> Taken for OptionalJson<T> {
    fn describe(into: &mut Description) {
        into.json_body::<T>(false);
    }
}

impl Taken for Request {
    fn describe(into: &mut Description) {
        into.raw_body();
    }
}

impl Taken for axum::body::Body {
    fn describe(into: &mut Description) {
        into.raw_body();
    }
}

impl<T: IntoParams> Taken for Query<T> {
    fn describe(into: &mut Description) {
        let parameters = T::into_params(|| Some(ParameterIn::Query));
        into.parameters
            .extend(parameters.iter().map(|parameter| json!(parameter)));
    }
}

impl Taken for super::events::LastEventId {
    fn describe(into: &mut Description) {
        into.parameters.push(json!({
            "name": "Last-Event-ID",
            "in": "header",
            "required": false,
            "description": "What a client of server-sent events that connects again saw last.",
            "schema": { "type": "string" },
        }));
    }
}

/// The one header that handlers look at otherwise.
impl Taken for HeaderMap {
    fn describe(into: &mut Description) {
        into.parameters.push(json!({
            "name": "Idempotency-Key",
            "in": "header",
            "required": false,
            "description": "The same call with the same key is done once.",
            "schema": { "type": "string", "minLength": 1, "maxLength": super::machines::MAX_KEY_BYTES, "pattern": "^[!-~]+$" },
        }));
    }
}

impl Taken for Path<String> {
    fn describe(_: &mut Description) {}
}

macro_rules! described_path {
    ($($part:ident)+) => {
        impl<$($part: PartialSchema),+> Taken for Path<($($part,)+)> {
            fn describe(into: &mut Description) {
                into.in_path = vec![$(json!($part::schema())),+];
            }
        }
    };
}

described_path!(A B);
described_path!(A B C);

impl<T: Answered, E> Answered for Result<T, E> {
    fn describe(into: &mut Description) {
        T::describe(into);
    }
}

impl<T: ToSchema> Answered for Json<T> {
    fn describe(into: &mut Description) {
        into.json_answer::<T>("200", "Done.");
    }
}

impl<T: ToSchema> Answered for super::answer::Created<T> {
    fn describe(into: &mut Description) {
        into.json_answer::<T>("201", "Made.");
    }
}
