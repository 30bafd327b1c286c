//! Schemas of types that are not written field by field: IDs, names, error codes, leases.

use crate::error_code::ErrorCode;
use crate::ids::{AccessId, ExecutionId, GrantId, MachineId, MachineName, SnapshotId, SshKeyId};
use crate::lease::{Lease, LeaseAction, LeaseMode};
use std::borrow::Cow;
use utoipa::openapi::schema::{Object, ObjectBuilder, Schema, Type};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{PartialSchema, ToSchema};

fn text(pattern: &str) -> RefOr<Schema> {
    Object::builder()
        .schema_type(Type::String)
        .pattern(Some(pattern))
        .into()
}

macro_rules! texts {
    ($($name:ident: $pattern:literal;)*) => {
        $(
            impl PartialSchema for $name {
                fn schema() -> RefOr<Schema> {
                    text($pattern)
                }
            }
            impl ToSchema for $name {
                fn name() -> Cow<'static, str> {
                    Cow::Borrowed(stringify!($name))
                }
            }
        )*
    };
}

texts! {
    MachineId: "^mch_[a-z2-7]{20}$";
    ExecutionId: "^exe_[a-z2-7]{20}$";
    SnapshotId: "^snap_[a-z2-7]{20}$";
    GrantId: "^pvg_[a-z2-7]{20}$";
    SshKeyId: "^sshkey_[a-z2-7]{20}$";
    AccessId: "^acc_[a-z2-7]{20}$";
    MachineName: "^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$";
}

impl PartialSchema for ErrorCode {
    fn schema() -> RefOr<Schema> {
        let codes = Self::ALL.iter().map(|code| code.as_str());
        ObjectBuilder::new()
            .schema_type(Type::String)
            .enum_values(Some(codes))
            .into()
    }
}

impl ToSchema for ErrorCode {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("ErrorCode")
    }
}

/// The policy's fields are the lease's own.
impl PartialSchema for Lease {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .property("seconds", u64::schema())
            .required("seconds")
            .property("action", Ref::from_schema_name(LeaseAction::name()))
            .required("action")
            .property("mode", Ref::from_schema_name(LeaseMode::name()))
            .required("mode")
            .property("deadline_unix_ms", u64::schema())
            .property("remaining_ms", u64::schema())
            .into()
    }
}

impl ToSchema for Lease {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("Lease")
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((LeaseAction::name().into_owned(), LeaseAction::schema()));
        schemas.push((LeaseMode::name().into_owned(), LeaseMode::schema()));
    }
}
