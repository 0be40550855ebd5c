-- Run once, on an empty volume, by the PostgreSQL image: a user for each server, who owns its databases and sees no other's.
-- The backquotes read the secrets here, so that none stands on a command line.
\set prefect_password `cat /run/secrets/prefect_db_password`
\set mlflow_password `cat /run/secrets/mlflow_db_password`
CREATE ROLE prefect LOGIN PASSWORD :'prefect_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE prefect OWNER prefect;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow; -- MLflow's users and permissions, with migrations of their own
REVOKE CONNECT ON DATABASE prefect, mlflow, mlflow_auth FROM PUBLIC;
